"""StoryWorld with boards: images that show more than a fixed number of image tokens can hold."""
