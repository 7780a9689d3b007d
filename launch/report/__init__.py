"""What a run has done and what it cost: sentences, page, picture, live view."""
