"""The agents: each a loop around a function that has never heard of Faust."""
