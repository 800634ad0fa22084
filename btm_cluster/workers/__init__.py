"""Engines that run steps, behind the port of `driver/port.py`: on Ray, in this process, or a dry run."""
