// A server of HTTP/1 and h2c by Go's own stack, with a gRPC health service written by hand.
package main

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
)

func health(w http.ResponseWriter, r *http.Request) {
	request, _ := io.ReadAll(r.Body)
	w.Header().Set("Content-Type", "application/grpc")
	w.Header().Set("Trailer", "Grpc-Status, Grpc-Message")
	if strings.Contains(string(request), "unknown") {
		w.Header().Set("Grpc-Status", "5")
		w.Header().Set("Grpc-Message", "unknown service ~ {äöü}")
		return
	}
	status := byte(1)
	if strings.Contains(string(request), "sick") {
		status = 2
	}
	w.Write([]byte{0, 0, 0, 0, 2, 8, status})
	w.(http.Flusher).Flush()
	w.Header().Set("Grpc-Status", "0")
}

func main() {
	var protocols http.Protocols
	protocols.SetUnencryptedHTTP2(true)
	protocols.SetHTTP1(os.Args[1] == "both")
	http.HandleFunc("/grpc.health.v1.Health/Check", health)
	http.HandleFunc("/status/", func(w http.ResponseWriter, r *http.Request) {
		var status int
		fmt.Sscanf(r.URL.Path, "/status/%d", &status)
		if r.ProtoMajor != 2 || (r.Header.Get("X-Token") == "" && r.URL.RawQuery == "token") {
			status = 500
		}
		w.WriteHeader(status)
		fmt.Fprintln(w, strings.Repeat("x", 100000))
	})
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		panic(err)
	}
	fmt.Println(listener.Addr().(*net.TCPAddr).Port)
	server := http.Server{Protocols: &protocols}
	panic(server.Serve(listener))
}
