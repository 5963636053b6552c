"""What more compute should give: one language model in three sizes."""
