"""`python -m t2ilearn` is the command line."""

from t2ilearn.cli import main

main()
