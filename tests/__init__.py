"""Tests of nodeagent: unit, contract, golden files and the lab."""
