"""What training left: measures and fair comparisons."""
