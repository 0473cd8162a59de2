"""The kinds of problem that train.py solves: what differs between them, one file each."""
