"""What a run came to: how well its pictures follow their captions, and the page that shows it."""
