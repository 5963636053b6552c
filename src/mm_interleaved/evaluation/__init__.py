"""Tasks, predictions and scores: metrics never see a model, the model never sees the answers."""
