"""How much precision costs in answers that are right or wrong."""
