"""What torchrun starts: ``-m launch.train``. Nothing imports it."""
