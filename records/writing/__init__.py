"""What is made of runs: series of seeds, packed scripts, submission folders, pictures and the leaderboard."""
