"""What is evaluated: a file a task, each with its gold documents and its scores."""
