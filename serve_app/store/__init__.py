"""Conversations, messages, images and stream sessions in one relational store."""

from serve_app.store.images import ImageFiles, SavedImage
from serve_app.store.passwords import Passwords, Verdict
from serve_app.store.records import BegunReply, Cursor, NewImage, NewSession, new_id
from serve_app.store.store import Store

__all__ = [
    "BegunReply",
    "Cursor",
    "ImageFiles",
    "NewImage",
    "NewSession",
    "Passwords",
    "SavedImage",
    "Store",
    "Verdict",
    "new_id",
]
