"""What is there: logs of runs, training scripts, submission folders, and the numbers that rules put on them."""
