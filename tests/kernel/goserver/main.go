// A Go server as it comes: since Go 1.24 its listener is MPTCP where the kernel has it.
package main

import (
	"fmt"
	"net/http"
	"os"
)

func main() {
	http.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintln(w, r.RemoteAddr)
	})
	fmt.Println(http.ListenAndServe(os.Args[1], nil))
}
