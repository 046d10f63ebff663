"""What the user's guide names beside the recipe: its configuration, its objects. All of it on the recipe's own road."""
