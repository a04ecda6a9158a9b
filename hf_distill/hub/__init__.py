"""What goes to the Hub with a student."""
