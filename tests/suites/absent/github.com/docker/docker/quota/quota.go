// Package quota stands in for Docker's, which Debian's golang-github-docker-docker-dev leaves out.
package quota

import "errors"

// ErrQuotaNotSupported is what Docker's tests look for.
var ErrQuotaNotSupported = errors.New("there are no limits here")
