"""Generation tasks: what a request asks for besides its prompt."""
