"""Growth: enlarge any dimension of a model, same function."""
