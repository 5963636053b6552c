"""StoryWorld: a small world of illustrated stories in which every answer is known (docs/storyworld.md)."""
