"""Services that stand for real ones, and execute what they are asked."""
