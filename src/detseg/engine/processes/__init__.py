"""The processes of a run: planning, starting, meeting on several machines, Slurm, sharding."""
