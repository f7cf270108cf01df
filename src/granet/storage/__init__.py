"""Models as small files: zeros are left out, numbers take few bytes, and nothing that a file claims is believed."""
