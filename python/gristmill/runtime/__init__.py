"""What runs a model: plans, sessions and their threads."""
