"""nodeagent turns a fresh cloud machine into a working member of a Docker Swarm cluster, alone."""

__version__ = "0.1.0"
