"""The plan of a network: operations, their memory and what runs each."""
