"""What is submitted: the job's specification, its code and its command."""
