"""What is random: one method, one file."""
