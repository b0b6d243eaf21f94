"""The worker: claims what is due, sends it, settles it, and finds what was left behind."""
