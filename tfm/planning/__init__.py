"""What a run would need and take on chips that nobody has to own: counted on compiled programs, then predicted."""
