"""Functions of clips whose values metrics compare, one a file, with the networks' weights from the user's files."""
