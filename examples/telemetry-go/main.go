// A function in Go, net/http as it comes: since Go 1.24 that is an MPTCP listener, which Weir
// steers to by its tc program. It counts readings like the Python example.
package main

import (
	"encoding/json"
	"log"
	"net/http"
	"os"
	"sync"
)

type reading struct {
	Device      string  `json:"device"`
	Temperature float64 `json:"temperature"`
}

func main() {
	var mu sync.Mutex
	devices := map[string]int{}
	events := 0

	http.HandleFunc("POST /", func(w http.ResponseWriter, r *http.Request) {
		var event reading
		if err := json.NewDecoder(r.Body).Decode(&event); err != nil {
			http.Error(w, err.Error(), http.StatusBadRequest)
			return
		}
		mu.Lock()
		devices[r.Header.Get("Ce-Subject")]++
		events++
		mu.Unlock()
		w.WriteHeader(http.StatusNoContent)
	})
	http.HandleFunc("GET /count", func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		_ = json.NewEncoder(w).Encode(map[string]int{"events": events, "devices": len(devices)})
	})

	port := os.Getenv("PORT")
	if port == "" {
		port = "8080"
	}
	log.Fatal(http.ListenAndServe(":"+port, nil))
}
