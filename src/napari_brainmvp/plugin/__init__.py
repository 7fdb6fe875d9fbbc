"""Everything that knows napari or Qt. Nothing here imports torch before the user asks for work."""
