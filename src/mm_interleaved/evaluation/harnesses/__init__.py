"""Evaluation harnesses that people already use: what they ask as documents, what was answered in their form.

A harness imports us; nothing of ours imports one, but for the file that is made for it.
"""
