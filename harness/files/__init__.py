"""Files from strangers: bounded, strict readers that every other room reads through. Imports no other room."""
