"""Many runs: search spaces, studies, the pool of trials, and the tables and pictures at their end."""
