# shellcheck shell=bash disable=SC2034,SC2154 # programs.sh reads this file, in this folder
CGO_ENABLED=0 build tool
