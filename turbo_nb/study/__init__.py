"""What notebooks 02 and 03 measure and draw."""
