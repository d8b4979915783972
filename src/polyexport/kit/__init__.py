"""An artifact proven where its runtime is: a folder to take there, and what comes back from it."""
