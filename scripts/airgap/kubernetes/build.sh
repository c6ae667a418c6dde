# shellcheck shell=bash disable=SC2034,SC2154 # programs.sh reads this file, in this folder
IFS=v. read -r _ major minor _ < <(go list -m -f '{{.Version}}' k8s.io/kubernetes)
package=k8s.io/component-base/version
flags="-X $package.gitVersion=$(go list -m -f '{{.Version}}' k8s.io/kubernetes)"
flags+=" -X $package.gitMajor=$major -X $package.gitMinor=$minor"
CGO_ENABLED=0 build tool
mv "$work/bin/server" "$work/bin/etcd"
