"""Tests of submitting, supervising and looking at runs on this machine."""
