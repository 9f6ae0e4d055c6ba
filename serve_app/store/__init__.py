"""Conversations, messages, images and stream sessions in one relational store."""
