"""The lab: whole machines to test on, booted in containers on one box."""
