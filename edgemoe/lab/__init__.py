"""The lab: measures a model on texts and decides from what it measured."""
