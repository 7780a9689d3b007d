"""What a checkpoint holds, how it is written, read back and retained."""
