"""From a plan to requests, and from requests to outcomes, through the port to the workers."""
