"""How a model routes: recording, replaying, predicting."""
