"""Short runs that find a number: a learning rate, the largest batch."""
