"""Find spans: ``annotate.py`` has the finders, ``contrast.py`` the one that uses the model itself."""
