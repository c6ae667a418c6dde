#!/bin/sh
# The published image's script installs EXTRA_PIP_PACKAGES first; nothing here needs that.
exec "$@"
